"""Triton kernels of msa_hf, also installed as `msa_hf.kernels`.

`available` names the kernels that this version ships. It is empty: every operation runs in plain PyTorch.
"""

available: tuple[str, ...] = ()
