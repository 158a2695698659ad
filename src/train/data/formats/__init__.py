"""What a row means: the types of datasets."""
