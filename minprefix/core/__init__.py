"""The readable core: the model, the prefix, the loss, the loop and the search."""
