"""Pure functions on tensors: images, sizes, masks, coordinates, Matrix NMS."""
