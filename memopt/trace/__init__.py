"""Tracing a training step into a StepTrace."""
