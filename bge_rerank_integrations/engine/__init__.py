"""Everything that touches torch: token ids in, logits out. Import from here only inside the package."""
