"""The app as a ZeroGPU Space runs it, with the real package `spaces`; the GPU that is lent is the CPU.

SPACES_ZERO_GPU=1 SPACES_ZERO_DEVICE_API_URL=http://... python zerogpu_space.py MODEL PORT
"""

import sys

import torch

# What `spaces` puts its emulation on, and a PyTorch for CPUs alone does not have.
torch.version.cuda = torch.version.cuda or "13.0"
torch._C._cuda_init = getattr(torch._C, "_cuda_init", None)
torch.cuda._is_in_bad_fork = bool

from spaces.zero import torch as emulation  # noqa: E402

from msa_hf.space_app import app, gpu  # noqa: E402

# What the process that has the GPU does first: it takes it, and moves the tensors there that were said to be.
emulation.init = lambda uuid: None
emulation.move = lambda callback=None: None
gpu.DEVICE = "cpu"

app.MODEL, app.HOST, app.PORT = sys.argv[1], "127.0.0.1", int(sys.argv[2])
app.main()
