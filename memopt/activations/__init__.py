"""Activations: regions, the two dispatch modes, and where op outputs wait for backward."""
