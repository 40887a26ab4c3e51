"""Adapters to existing trainers. Importing one imports its framework; importing this package, or the library, imports none."""
