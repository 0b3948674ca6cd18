"""Networks: the registry of backbones and the classifier that the trunk, the experts and the dense baseline all are."""
