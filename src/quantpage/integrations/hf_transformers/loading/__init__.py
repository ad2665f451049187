"""From a folder or an id in the hub to a model and the shape of its cache."""
