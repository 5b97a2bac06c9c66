"""Export: what a trained network becomes outside of training."""

from apot_fat.export.integer import Divergence, IntegerLayer, compare_networks, integer_network, simulated_accumulator

__all__ = ["Divergence", "IntegerLayer", "compare_networks", "integer_network", "simulated_accumulator"]
