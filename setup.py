"Build file: everything it knows comes from settings.ini (nbdev's stock setup.py would put a slash into the entry point)."
import os
from configparser import ConfigParser
from pathlib import Path

import setuptools

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="], interpolation=None)
cfg.read(here / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]


def lines(key: str) -> list[str]:
    return [line.strip() for line in cfg.get(key, "").splitlines() if line.strip()]


extras = {name: lines(f"{name}_requirements") for name in ("train", "track", "openvino", "aws", "spark", "dev")}

setuptools.setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    classifiers=["Programming Language :: Python :: 3.11", "Intended Audience :: Science/Research"],
    package_dir={"": os.path.dirname(cfg["lib_path"])},
    packages=setuptools.find_packages(os.path.dirname(cfg["lib_path"])),
    package_data={"textrelay": ["py.typed"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": lines("console_scripts")},
    zip_safe=False,
)
