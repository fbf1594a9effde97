"""Evaluation: samples, engines, scores. Sits beside the integrations; nothing below imports it."""
