"""Training code of the embedded model, from packages on public indexes; see README.md in this folder."""
