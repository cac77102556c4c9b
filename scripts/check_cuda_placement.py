"""What the CUDA backend does is as it must be, on a machine without a GPU: all of it but numbers and times.

    python scripts/check_cuda_placement.py artifacts/cuda-standin      # minutes once, half a minute afterwards

ONNX Runtime's CUDA provider runs over a stand-in for CUDA (`cuda_standin/`, built in that folder) with the demo
checkpoint in every recipe that CUDA runs. Each recipe's JSON line says where nodes ran, what steps launched and copied,
and what is wrong with it. Then faults are planted, and each must be found. The exit code is 6 where one is not, or
where anything else is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cuda_standin.build import HERE, StandIn, build
from cuda_standin.records import Observation, observation_from_dict
from cuda_standin.verdict import EXPECTED, faults, shown
from demo_bundles import HALF, RECIPES, make_bundle
from pixtral_runtime.backends.ort_cuda import BATCHED_KERNELS

PLACED = {
    **{name: RECIPES[name] for name in ("float32", "float16", "float16, int8 KV cache", "int4, int8 KV cache")},
    "int4 by 128": replace(HALF, precision="int4", group_size=128),
    "int4 by 32": replace(HALF, precision="int4", group_size=32),
}
CHOICES = {
    "as chosen": {},
    "Flash": {"ORT_ENABLE_CUDNN_FLASH_ATTENTION": "0"},  # cuDNN's kernels have no grid here
    "for many slots": {BATCHED_KERNELS: "1"},
}


def observe(standin: StandIn, bundle: Path, fault: str | None, variables: Mapping[str, str]) -> Observation:
    command: list[str | Path] = [standin.python, HERE / "observe.py", bundle, *(["--plant", fault] if fault else [])]
    environment = {**os.environ, **standin.variables, **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return observation_from_dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="takes the stand-in and the bundles; 0.8 GB")
    parser.add_argument("--recipes", nargs="+", choices=list(PLACED), default=list(PLACED))
    args = parser.parse_args()
    standin = build(args.folder)
    passed = True
    for recipe in args.recipes:
        bundle = make_bundle(recipe, PLACED[recipe], None, args.folder / "bundles")
        for choice, variables in CHOICES.items():
            if BATCHED_KERNELS in variables and bundle.precision != "int4":
                continue
            observation = observe(standin, bundle.path, None, variables)
            wrong = faults(observation)
            passed &= not wrong
            print(json.dumps({"recipe": recipe, "kernels": choice, "faults": wrong, **shown(observation)}), flush=True)
    bundle = make_bundle("float16", PLACED["float16"], None, args.folder / "bundles")
    for fault, words in EXPECTED.items():
        wrong = faults(observe(standin, bundle.path, fault, {}))
        found = [text for text in wrong if words in text]
        passed &= bool(found)
        print(json.dumps({"planted": fault, "found": found, "beside": [text for text in wrong if text not in found]}))
    print(json.dumps({"passed": passed}))
    sys.exit(0 if passed else 6)


if __name__ == "__main__":
    main()
