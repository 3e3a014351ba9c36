"""The reference: the model, the prefix, the loss, the loop and the search."""
