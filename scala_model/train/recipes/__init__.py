"""One file a recipe; its head says the command, the hardware, the duration and the accuracy to expect."""
