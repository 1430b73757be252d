"""Batched generation with a paged key/value cache.

Read in this order: request.py (what is asked and answered), block_manager.py (who owns which cache block), scheduler.py
(what is computed next), sampling.py (logits to token), engine.py (the loop). The first three are plain Python on ints
and lists.
"""
