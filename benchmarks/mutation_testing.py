"""Mutation testing: how many small changes of the code the tests notice.

    .venv/bin/pip install cosmic-ray
    .venv/bin/python benchmarks/mutation_testing.py --count 100 --seed 1 --out mutants.jsonl

Samples places in `PACKAGES`, changes one at a time in a clone of the last commit, and runs the test
files that name the changed module or what it defines, most mentions first, until one fails. Places
are drawn with equal probability, then one of the operators of cosmic-ray that apply there. A mutant
that survives is printed; it may be equivalent to the original, such as another bound that no value
lies between. C code is not mutated.
"""

import argparse
import ast
import collections
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import use_mutation
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ops", "data", "checkpoint", "inference")
SKIPPED = re.compile("BitOr_|_(BitXor|BitAnd|BitOr|RShift|LShift)$|_(Is|IsNot|UAdd|Invert)$|Remove")
"""Operators that annotations of types, or Python itself, notice."""
MAX_FILES = 8
"""Test files run against a mutant."""
SECONDS = 900
"""Time after which a mutant counts as killed: it hangs."""
TIMED_OUT = 124
KILLED = (1, 2, TIMED_OUT)
"""Exit codes of pytest for a test or an import that fails, and of the time limit."""


def sample(count, seed):
    """Draw (module, line, operator, occurrence) of `count` places."""
    operators = collections.defaultdict(list)
    for package in PACKAGES:
        modules = sorted((ROOT / "simplernn_jax" / package).rglob("*.py"))
        for item in _all_work_items(modules, {}):
            (found,) = item.mutations
            if not SKIPPED.search(found.operator_name):
                place = str(Path(found.module_path).relative_to(ROOT)), found.start_pos
                operators[place].append((found.operator_name, found.occurrence))
    draw = random.Random(seed)
    places = draw.sample(sorted(operators), min(count, len(operators)))
    total = sum(map(len, operators.values()))
    print(f"{len(places)} of {len(operators):,} places; {total:,} mutants")
    return [
        (module, line, *draw.choice(operators[module, (line, at)])) for module, (line, at) in places
    ]


def tests_of(module):
    """List the test files that mention a module or its public names, most mentions first."""
    tree = ast.parse((ROOT / module).read_text())
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    words = [name for name in defined if not name.startswith("_")]
    dotted = module.removesuffix(".py").replace("/", ".")
    scores = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        score = 3 * (dotted in text) + 5 * (path.stem == f"test_{Path(module).stem}")
        score += sum(bool(re.search(rf"\b{word}\b", text)) for word in words)
        if score:
            scores[path] = score, -path.stat().st_size
    chosen = sorted(scores, key=scores.get, reverse=True)[:MAX_FILES]
    return [str(path.relative_to(ROOT)) for path in chosen]


def run_tests(clone, module):
    """Run the tests of a module in a clone; return the exit code."""
    environment = {**os.environ, "PYTHONPATH": str(clone), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", *tests_of(module)],
            cwd=clone,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        return TIMED_OUT


def outcome(clone, mutant):
    """Run the tests of a mutant in a clone; return a row of the result."""
    module, line, operator, occurrence = mutant
    before = (clone / module).read_text().splitlines()[line - 1].strip()
    with use_mutation(clone / module, get_operator(operator)(), occurrence) as (_, changed):
        after = changed.splitlines()[line - 1].strip()
        code = run_tests(clone, module)
    if code and code not in KILLED:
        raise RuntimeError(f"the tests of {module} end with code {code}")
    return {"module": module, "line": line, "before": before, "after": after, "code": code}


def cloned(folder):
    """Clone the last commit into a folder."""
    clone = Path(folder, "clone")
    command = ["git", "clone", "--quiet", ROOT, clone]
    subprocess.run(command, check=True)
    return clone


def main():
    """Sample, run and report; 1 if more than a tenth of the mutants survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=None, help="file for a row of each mutant")
    flags = parser.parse_args()
    mutants = sample(flags.count, flags.seed)
    with tempfile.TemporaryDirectory() as folder:
        if run_tests(cloned(folder), mutants[0][0]):
            sys.exit("the tests fail without a mutation")
    rows = []

    def run(mutant):
        with tempfile.TemporaryDirectory() as folder:
            row = outcome(cloned(folder), mutant)
        rows.append(row)
        if flags.out is not None:
            flags.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        if not row["code"]:
            print("survived: {module}:{line}: {before}  ->  {after}".format(**row), flush=True)

    with ThreadPoolExecutor(flags.processes) as pool:
        list(pool.map(run, mutants))
    survived = sum(not row["code"] for row in rows)
    hanging = sum(row["code"] == TIMED_OUT for row in rows)
    print(f"{len(rows) - survived} of {len(rows)} mutants killed, {hanging} by the time limit")
    return int(10 * survived > len(rows))


if __name__ == "__main__":
    sys.exit(main())
