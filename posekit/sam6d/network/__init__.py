"""The network part by part, from small to large, as the checkpoint names its tensors."""
