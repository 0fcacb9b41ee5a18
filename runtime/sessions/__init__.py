"""Engines that are ready to run, a module for each kind."""
