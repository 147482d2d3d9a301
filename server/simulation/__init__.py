"""Traffic and time without a server: workloads, and policies judged on them. Nothing here is loaded to serve."""
