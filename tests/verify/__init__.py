"""Verification, by rewrites that are wrong."""
