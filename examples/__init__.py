"""Small complete applications, and what they share."""
