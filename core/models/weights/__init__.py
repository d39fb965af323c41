"""Weights: found in files of any format, laid out, quantized or made up."""
