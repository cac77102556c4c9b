#!/usr/bin/env bash
# On the GPU machine: unpack what .device/ brought, outside the repository, and run the stages of device_check.py.
#   bash scripts/device_check.sh [--stages a,b,c] [--total SECONDS] [--out FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export DEVICE_CHECK_WORK=${DEVICE_CHECK_WORK:-/tmp/device-check} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export DEVICE_CHECK_BEGAN; DEVICE_CHECK_BEGAN=$(date +%s)
python=${PYTHON:-python3}
pack=${DEVICE_CHECK_PACK:-.device}
if [ ! -f "$DEVICE_CHECK_WORK/unpacked" ]; then
    mkdir -p "$DEVICE_CHECK_WORK"
    "$python" - "$pack" "$DEVICE_CHECK_WORK" <<'PY' || exit 1
import lzma, shutil, sys, tarfile, threading
from pathlib import Path

pack, work = map(Path, sys.argv[1:])
provider = work / "site/onnxruntime/capi/libonnxruntime_providers_cuda.so"
provider.parent.mkdir(parents=True, exist_ok=True)
failed = []

def unpack(job):
    try:
        job()
    except Exception as error:
        failed.append(error)

def libraries():
    with lzma.open(pack / "provider.so.xz") as source, open(provider, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 24)

def rest():
    with tarfile.open(pack / "pack.tar.xz") as archive:
        archive.extractall(work, filter="data")

threads = [threading.Thread(target=unpack, args=(job,)) for job in (libraries, rest)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
if failed:
    sys.exit(f"unpacking failed: {failed}")
(work / "unpacked").touch()
PY
fi
echo "unpacked after $(($(date +%s) - DEVICE_CHECK_BEGAN)) s"
libraries=$("$python" -c 'import nvidia; print(list(nvidia.__path__)[0])' 2>/dev/null) &&
    folders=$(find "$libraries" -name '*.so*' -not -path '*/stubs/*' -printf '%h\n' | sort -u | paste -sd:) &&
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folders:$DEVICE_CHECK_WORK/links
export PYTHONPATH=$DEVICE_CHECK_WORK/site:$PWD:$PWD/runtime:$PWD/engines:$PWD/scripts
exec "$python" scripts/device_check.py "$@"
