"""Images of rows: found, checked, placed among tokens, and made into features."""
