# SPDX-License-Identifier: Apache-2.0
"""python3 .ci/make_venv.py [EXTRA]: make .venv and install facelab into it, once per pyproject.toml.

Runs under any Python with nothing installed, so that an old one gets a sentence and not a syntax error.
"""

import hashlib
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
NEEDED = (3, 10)


def main():
    if sys.version_info[:2] < NEEDED:
        return fail(
            "Python %d.%d is too old, facelab needs %d.%d or newer; name another one: make PYTHON=python3.12 ..."
            % (sys.version_info[:2] + NEEDED)
        )
    extra = sys.argv[1] if len(sys.argv) > 1 else ""
    fingerprint = stamp_text()
    if any(read(stamp(name)) == fingerprint for name in {extra, "dev"}):
        return 0
    if not os.path.exists(python()) and not make_venv():
        return 2
    return install(extra, fingerprint)


def make_venv():
    say("Making .venv with %s" % sys.executable)
    done = subprocess.run([sys.executable, "-m", "venv", VENV], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        subprocess.run([sys.executable, "-c", "import shutil, sys; shutil.rmtree(sys.argv[1], True)", VENV])
        version = "%d.%d" % sys.version_info[:2]
        fail(
            "this Python cannot make a virtual environment (python3 -m venv failed); on Debian or Ubuntu: "
            "apt install python%s-venv; or use the interpreter as it is: make NO_VENV=1 ..." % version
        )
        last = done.stdout.decode(errors="replace").strip().splitlines()[-1:]
        sys.stderr.write("  " + "".join(last) + "\n")
        return False
    return True


def install(extra, fingerprint):
    target = ".[%s]" % extra if extra else "."
    say("Installing facelab %s into .venv (a few minutes the first time; torch is large)" % target)
    start = time.time()
    command = [
        python(),
        "-m",
        "pip",
        "install",
        "-qq",
        "--no-compile",
        "--disable-pip-version-check",
        "--editable",
        target,
    ]
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        return fail("pip could not install facelab: see its message above; is a package index reachable?")
    with open(stamp(extra), "w") as file:
        file.write(fingerprint)
    say("Installed in %.0f s" % (time.time() - start))
    return 0


def stamp_text():
    digest = hashlib.sha256(("%d.%d " % sys.version_info[:2]).encode())
    for name in ("pyproject.toml", "setup.py"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def stamp(extra):
    return os.path.join(VENV, ".facelab-%s" % (extra or "core"))


def python():
    return os.path.join(VENV, "bin", "python")


def read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def say(message):
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def fail(message):
    sys.stderr.write("error: " + message + "\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
