"""The part of the package that uses torch: it takes token ids and returns logits. It is not public."""
