"""What depends on the process: locks, threads, forks, interrupts, exit, and objects that it shares."""
