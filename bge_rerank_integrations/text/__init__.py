"""Converts texts to token ids."""
