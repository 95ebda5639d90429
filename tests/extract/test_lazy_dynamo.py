"""torch's compiler is not imported by commands that compile nothing, and is there on request."""

import subprocess
import sys

STEP = """
import os
import sys
import traceback
import torch
from extract.backbone.model import load_trunk
from aggregate.training.recipes import make_optimizer, parameter_groups, recipe
trunk = load_trunk("test_resnet", weights="random")
module = torch.nn.Linear(2, 2)
optimizers = []
for name in ("sgd", "adamw"):
    chosen = recipe("cached", "tsn", videos=10, optimizer=name)
    optimizers.append(make_optimizer(parameter_groups(module, chosen), chosen))
def step():
    for one in optimizers:
        one.zero_grad()
        module(torch.ones(1, 2)).sum().backward()
        one.step()
        one.load_state_dict(one.state_dict())
step()
assert "sympy" not in sys.modules, "the compiler was loaded"
"""
# Each runs in a process of its own, in which the compiler was not used yet.
ASKED = (
    "",
    "import torch._dynamo.config; assert torch._dynamo.config.recompile_limit",
    "from torch._dynamo.utils import counters; assert not counters['stats']",
    "held = sys.modules['torchvision.ops.roi_align'].is_compile_supported\n"
    "from torch._dynamo.utils import is_compile_supported as real; assert held('cpu') == real('cpu') != held",
    "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)) == 2",
    "exported = torch.export.export(module, (torch.ones(1, 2),))\n"
    "assert torch.equal(exported.module()(torch.ones(1, 2)), module(torch.ones(1, 2)))",
    "import torch._dynamo; assert not hasattr(torch._dynamo, 'no_such_name')",
)
EACH = f"""
for asked in {ASKED!r}:
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            sys.exit(f"failed: {{asked}}")
        continue
    try:
        exec(asked, globals())
        step()
        assert "sympy" not in sys.modules or asked
        import torch._dynamo
        torch._dynamo.graph_break()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
print("all")
"""


def test_the_compiler_comes_when_it_is_asked_for_and_training_goes_on():
    done = subprocess.run(
        [sys.executable, "-c", STEP + EACH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["all"]
