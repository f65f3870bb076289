"""Small complete applications, and the modules that they share."""
