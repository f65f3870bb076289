"""Makes the embedded model from what the package indexes hold; see README.md in this folder."""
