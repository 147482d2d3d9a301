"""Traffic and time without a server: workloads, and policies judged on them. A server loads the command alone."""
