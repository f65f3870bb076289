"""State of the process: forks, interpreter exit, exceptions and warnings."""
