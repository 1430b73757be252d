"""LoRA fine-tuning on packed rows.

Read in this order: data.py (rows to tokens, and which rows make a step), trainer.py (the loop), checkpoint.py (what a
killed run goes on from).
"""
