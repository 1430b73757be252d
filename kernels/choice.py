"""Whose kernels serve, where ISHEEP_KERNELS in the environment says so: to see what a kernel changes."""

import os

CHOICES = {
    "": "C++ on a CPU, Triton on a GPU",
    "torch": "torch's definitions on every device",
    "hopper": "on Hopper, the kernels written for it in Gluon, which no GPU has run yet; else as without it",
}


def asked_for(choice: str) -> bool:
    """Whether ISHEEP_KERNELS is this one of CHOICES. ValueError where it is none of them."""
    found = os.environ.get("ISHEEP_KERNELS", "")
    if found not in CHOICES:
        names = ", ".join(name for name in CHOICES if name)
        raise ValueError(f'ISHEEP_KERNELS is "{found}" and can be {names}, or be left out.')
    return found == choice
