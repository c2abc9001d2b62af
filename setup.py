"""Build fastlm's two extensions with ninja: _cpu from csrc/cpu with GCC or Clang, _cuda from csrc/cuda where nvcc is
found.

A build that fails, or a compiler that is not there, is no error: the install goes on, every op runs by its definition,
and fastlm/build.json tells `fastlm info` what is missing, why, and the cure. No torch header is involved, so one build
serves every torch, and none is needed to build.

FASTLM_ISAS="avx2 avx512" builds no other instruction sets than these and the portable one; FASTLM_SANITIZE=KIND builds
what GCC's -fsanitize=KIND watches.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPU, CUDA = ROOT / "csrc" / "cpu", ROOT / "csrc" / "cuda"
X86 = platform.machine().lower() in ("x86_64", "amd64")
WARNINGS = ["-Wall", "-Wextra"]
OPTIMISE = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
ISA_FLAGS = {"portable": []} | ({"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX} if X86 else {})
# compiled once per instruction set, the second kind not for AMX, which multiplies matrices; the rest of csrc/cpu once
PER_ISA = ("table", "attention/forward", "attention/backward")
ELEMENTWISE = (
    "attention/rotary", "layers/embedding", "layers/gate", "layers/linear", "layers/loss", "layers/norm",
    "optim/adafactor", "optim/adam", "optim/sgd", "optim/unscale",
)  # fmt: skip
CUDA_TARGETS = ("80", "90a", "100", "120")  # and PTX of the last, for what comes after


class Missing(Exception):
    """A tool or a step of the build failed: str(error) is the reason, `cure` what to do."""

    def __init__(self, why: str, cure: str):
        super().__init__(why)
        self.cure = cure


class NinjaBuild(build_ext):
    """Build each extension by itself, write down how it went, and never fail the install."""

    def run(self):
        report = {}
        for name, plan in (("cpu", plan_cpu), ("cuda", plan_cuda)):
            target = Path(self.get_ext_fullpath(f"fastlm._{name}")).absolute()
            try:
                report[name] = {"built": True, **build(name, target, Path(self.build_temp).absolute(), plan)}
            except Missing as error:
                target.unlink(missing_ok=True)
                report[name] = {"built": False, "why": str(error), "cure": error.cure}
                print(f"fastlm: not building _{name}: {error}; cure: {error.cure}", file=sys.stderr)
        folder = ROOT / "fastlm" if self.inplace else Path(self.build_lib) / "fastlm"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.json").write_text(json.dumps(report, indent=1) + "\n")
        self._built = [name for name, entry in report.items() if entry["built"]]

    def get_outputs(self):
        return [self.get_ext_fullpath(f"fastlm._{name}") for name in getattr(self, "_built", ())]

    def get_output_mapping(self):
        return {}


def build(name: str, target: Path, temp: Path, plan) -> dict:
    """Write temp/build.ninja for the plan, run ninja, return what `fastlm info` should know. Raises Missing."""
    temp = temp / name
    temp.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    lines, facts = plan(target)
    (temp / "build.ninja").write_text("\n".join(lines) + "\n")
    done = subprocess.run([ninja(), "-C", str(temp)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise Missing(
            f"compiling failed: {last_error(done.stdout)}", "read the compiler's output with `pip install -v .`"
        )
    return facts


def plan_cpu(target: Path) -> tuple[list[str], dict]:
    compiler, version = cxx()
    asked = os.environ.get("FASTLM_SANITIZE", "")
    # of what watches memory, GCC optimises for longer than the tests then run; threads are watched at little cost
    level = "-O1" if asked == "thread" else "-O0"
    sanitize = [f"-fsanitize={asked}", "-fno-omit-frame-pointer", "-g1", level] if asked else []
    openmp = asked != "thread" and compiles(compiler, ["-fopenmp"])  # csrc/cpu/parallel.h has another way
    threads = ["-fopenmp" if openmp else "-pthread"]
    wanted = ("portable", *os.environ.get("FASTLM_ISAS", " ".join(ISA_FLAGS)).split())
    # an old compiler lacks the newest sets
    known = {isa: flags for isa, flags in ISA_FLAGS.items() if isa in wanted and compiles(compiler, flags)}
    # whose kernels it has where it has none of its own
    for isa, below in (("avx512_bf16", "avx512"), ("amx", "avx512_bf16")):
        if below not in known:
            known.pop(isa, None)
    defines = [f"-DFASTLM_HAS_{isa.upper()}" for isa in known]
    common = [
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        *WARNINGS,
        *OPTIMISE,
        *threads,
        *includes(),
        *defines,
    ]
    lines = rule(
        "cxx", [*compiler, "-MMD", "-MF", "$out.d", *common, "$flags", "-c", "$in", "-o", "$out"], depfile=True
    )
    objects = []
    for source in sorted(CPU.rglob("*.cpp")):
        name = source.relative_to(CPU).with_suffix("").as_posix()
        sets = known if name in PER_ISA + ELEMENTWISE else {"": []}
        for isa, flags in sets.items():
            if isa == "amx" and name in ELEMENTWISE:
                continue
            objects.append(f"{name}{'.' * bool(isa)}{isa}.o")
            extra = [f"-DFASTLM_ISA={isa}", *flags] if isa else []
            extra += sanitize if name != "bindings" else sanitize and ["-O0"]  # pybind11's templates take longest
            lines += [f"build {objects[-1]}: cxx {escape(source)}", f"  flags = {shlex.join(extra)}"]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    lines += rule("link", [*compiler, "-shared", *threads, *sanitize, *undefined, "$in", "-o", "$out"])
    lines += [f"build {escape(target)}: link {' '.join(objects)}"]
    return lines, {"compiler": version, "openmp": openmp, "isas": list(known)}


def plan_cuda(target: Path) -> tuple[list[str], dict]:
    # bindings.cpp takes long, and would be waited for alone as the last
    sources = sorted(CUDA.rglob("*.cpp")) + sorted(CUDA.rglob("*.cu"))
    objects = [f"{s.relative_to(CUDA).with_suffix('').as_posix()}.o" for s in sources]
    compiler, version = nvcc()
    host, _ = cxx()
    listing = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    # an older toolkit lacks the newest
    targets = [t for t in CUDA_TARGETS if f"sm_{t}" in listing or f"sm_{t.rstrip('a')}" in listing]
    if not targets:
        raise Missing(
            f"nvcc ({version}) compiles for none of {', '.join(CUDA_TARGETS)}",
            "install the CUDA toolkit 12.8 or newer, then reinstall",
        )
    gencode = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
    gencode += [f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"]
    flags = [
        "-std=c++17",
        "-O3",
        "-fmad=false",
        "-ccbin",
        host[0],
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
        "-cudart=static",
        "-Xptxas=-v",
        *gencode,
        *includes(),
    ]
    lines = rule("nvcc", [compiler, "-MD", "-MF", "$out.d", *flags, "-c", "$in", "-o", "$out"], depfile=True)
    lines += [f"build {o}: nvcc {escape(s)}" for o, s in zip(objects, sources, strict=True)]
    lines += rule("link", [compiler, "-shared", "-ccbin", host[0], "-cudart=static", "$in", "-o", "$out"])
    lines += [f"build {escape(target)}: link {' '.join(objects)}"]
    return lines, {"compiler": version, "targets": [f"sm_{t}" for t in targets]}


def rule(name: str, command: list[str], depfile: bool = False) -> list[str]:
    words = " ".join(w if w.startswith("$") else shlex.quote(w) for w in command)
    return [f"rule {name}", f"  command = {words}", *(["  depfile = $out.d", "  deps = gcc"] if depfile else [])]


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def includes() -> list[str]:
    try:
        import pybind11
    except ImportError as error:
        raise Missing("pybind11 is not installed", "pip install pybind11 ninja, then build again") from error
    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]


def ninja() -> str:
    try:
        import ninja as package

        return str(Path(package.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise Missing("ninja is not installed", "pip install ninja, then build again") from None
        return found


def cxx() -> tuple[list[str], str]:
    """The C++ compiler as a command, from CXX or the usual names, and its version. Raises Missing if none works."""
    asked = os.environ.get("CXX")
    candidates = [shlex.split(asked)] if asked else [[name] for name in ("c++", "g++", "clang++")]
    for command in candidates:
        if shutil.which(command[0]) and compiles(command, ["-std=c++17"]):
            return command, subprocess.run(
                [*command, "--version"], stdout=subprocess.PIPE, text=True
            ).stdout.splitlines()[0]
    names = " or ".join(shlex.join(c) for c in candidates)
    raise Missing(
        f"no C++17 compiler that works ({names})", "install one (Debian: apt install g++), or set CXX, then reinstall"
    )


def compiles(compiler: list[str], flags: list[str]) -> bool:
    """Whether a small library compiles and links with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        probe = [*compiler, *flags, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(Path(folder) / "probe")]
        return (
            subprocess.run(
                probe, input="#include <vector>\nint probe() { return 0; }\n", text=True, capture_output=True
            ).returncode
            == 0
        )


def nvcc() -> tuple[str, str]:
    """The CUDA compiler from CUDA_HOME, PATH or where CUDA's installer puts it, and its version. Raises Missing if
    there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    found = found or (None if home else shutil.which("nvcc", path="/usr/local/cuda/bin"))
    if found is None:
        raise Missing(
            "nvcc was not found",
            "install the CUDA toolkit 12.8 or newer, or set CUDA_HOME, then reinstall; without a GPU nothing is lost",
        )
    return found, subprocess.run([found, "--version"], stdout=subprocess.PIPE, text=True).stdout.strip().splitlines()[
        -1
    ]


def last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if not line.startswith("ninja:")]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no output"])[0]


setup(
    packages=["fastlm", "fastlm.kernels", *(f"fastlm.{name}" for name in find_packages("fastlm"))],
    package_dir={"": "."},
    package_data={"fastlm": ["py.typed"]},
    ext_modules=[Extension("fastlm._cpu", []), Extension("fastlm._cuda", [])],
    cmdclass={"build_ext": NinjaBuild},
)
