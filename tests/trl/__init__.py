"""Trainers of TRL on optimized models."""
