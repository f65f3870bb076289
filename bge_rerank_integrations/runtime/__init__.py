"""What belongs to the process: forks, exit, errors and warnings."""
