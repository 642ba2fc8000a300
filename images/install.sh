#!/bin/sh
# Run inside an image build: install.sh dependencies EXTRAS -> /opt/kubeinfer (a virtual environment without the project);
#                            install.sh project             -> /opt/project (the project alone, in the same layout).
# Two steps and two layers, so that a change of the project's code rebuilds and reloads only a small one.
set -eu
cd /build
[ -n "${PIP_INDEX_URL:-}" ] || unset PIP_INDEX_URL
[ -n "${PIP_EXTRA_INDEX_URL:-}" ] || unset PIP_EXTRA_INDEX_URL
export PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
[ ! -d /wheels ] || export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels
[ ! -s constraints.txt ] || constraints="--constraint constraints.txt"
# Byte code that depends on no time stamp: the same bytes from every build, and no check of the sources at import
compile() { /opt/kubeinfer/bin/python -m compileall -q -f -j 0 --invalidation-mode unchecked-hash "$1" || true; }

case $1 in
dependencies)
  python3 -m venv ${SITE_PACKAGES:+--system-site-packages} /opt/kubeinfer
  /opt/kubeinfer/bin/python requirements.py pyproject.toml "$2" >requirements.txt
  /opt/kubeinfer/bin/pip install --quiet --no-compile ${constraints:-} --requirement requirements.txt
  cd /opt/kubeinfer/lib/python3*/site-packages
  # Headers and development tools of torch, and the packages' own tests: nothing at run time reads them
  rm -rf torch/include torch/share torch/test torch/bin/protoc* torch/bin/test_* torch/lib/*.a
  find . -type d \( -name tests -o -name __pycache__ \) -path '*/*' ! -path './torch/*' ! -path './numpy/*' -prune -exec rm -rf {} +
  find . -name __pycache__ -prune -exec rm -rf {} +
  compile .
  ;;
project)
  /opt/kubeinfer/bin/pip install --quiet --no-compile --no-deps --no-build-isolation --prefix /opt/project ./source
  compile /opt/project/lib/python3*/site-packages
  ;;
esac
