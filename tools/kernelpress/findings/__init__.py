"""Findings, the catalogue of rules behind them, and their forms for people and programs."""
