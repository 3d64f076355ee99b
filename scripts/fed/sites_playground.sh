#!/usr/bin/env bash
# Clients on other machines, all on this one, from nothing: kits with certificates, a server and three
# sites as processes of their own with mutual TLS, two rounds on the playground; and the same run
# without them, which must end in the same bits. Ends in runs/sites/ and leaves no process.
# Flags at the end go to both runs: bash scripts/fed/sites_playground.sh --fed_method scaffold
# SECURE=1 bash scripts/fed/sites_playground.sh: in secure sums, beside the same run in the open, whose
# step it must be to 1e-3. Sites tell each other their public keys; here the script is the telephone.
set -euo pipefail
SECURE=${SECURE:-}
EXTRAS=remote${SECURE:+,privacy}
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

out="$ROOT/runs/sites"
sites=(animals food travel)
data="$ROOT/playground/data/emoji"
started=$SECONDS
"$PYTHON" -m playground.tools.unpack_data
rm -rf "$out"
mkdir -p "$out"

# Nothing is measured on held-out data: that would need the model here, too.
flags="$("$PYTHON" -m playground.flags pretrain | sed '/^--fed_eval_/,+1d')"

processes=()
stop() { # end what was started, and wait for it
    for process in "${processes[@]}"; do kill "$process" 2>/dev/null || true; done
    for process in "${processes[@]}"; do wait "$process" 2>/dev/null || true; done
    processes=()
}
trap 'code=$?; stop; [ $code = 0 ] || echo "error: it has failed; see $out/*.log" >&2' EXIT

say() { echo "== $* ($((SECONDS - started)) s)"; }

launch() { # launch NAME COMMAND…: in the background, its output in $out/NAME.log
    local name=$1
    shift
    "$@" >"$out/$name.log" 2>&1 &
    processes+=($!)
}

train() { # train NAME FLAGS…: a run of two rounds into $out/NAME
    local name=$1
    shift
    "$PYTHON" -m fed.train $flags --fed_rounds 2 --report_to none --output_dir "$out/$name" "$@"
}

say "kits: for the server, for the run, and for each site"
port="$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
"$PYTHON" -m fed.remote.kits --server "localhost:$port" --output "$out/kits" "${sites[@]/#/--site=}"

say "the server"
launch server "$PYTHON" -m fed.remote.server "$out/kits/localhost"

say "three sites: ${sites[*]}"
echo "clients:" | tee "$out/sites.yaml" >"$out/resident.yaml"
for site in "${sites[@]}"; do
    cat >"$out/$site.yaml" <<YAML
name: $site
courier: flare
kit: kits/$site
work: work-$site
data_path: $data/clients/topic/$site.json
image_folder: $data/images
model_name_or_path: $ROOT/playground/backbones/llm
vision_tower: $ROOT/playground/backbones/vision_tower
YAML
    echo "  - {name: $site}" >>"$out/sites.yaml"
    echo "  - {name: $site, data_path: $data/clients/topic/$site.json, image_folder: $data/images}" \
        >>"$out/resident.yaml"
done
secure=()
if [ -n "$SECURE" ]; then
    secure=(--fed_secure True)
    say "each site's public key, for the others"
    for site in "${sites[@]}"; do
        key="$("$PYTHON" -m fed.site "$out/$site.yaml" --key)"
        echo "$site: $key"
        for other in "${sites[@]}"; do
            [ "$site" = "$other" ] || echo "  $site: \"$key\"" >>"$out/$other.trust"
        done
    done
    for site in "${sites[@]}"; do
        { echo "trust:"; cat "$out/$site.trust"; } >>"$out/$site.yaml"
    done
fi
for site in "${sites[@]}"; do
    launch "$site" "$PYTHON" -m fed.site "$out/$site.yaml"
done

say "two rounds, the sites at work"
train remote --fed_clients "$out/sites.yaml" --fed_driver remote \
    --fed_remote_kit "$out/kits/admin" "${secure[@]+"${secure[@]}"}" "$@"

say "stopping server and sites"
stop

say "the same run in one process"
train resident --fed_clients "$out/resident.yaml" "$@"

if [ -n "$SECURE" ]; then
    train start --fed_clients "$out/resident.yaml" "$@" --learning_rate 0
    "$PYTHON" - "$out" <<'PYTHON'
import sys
from pathlib import Path

from fed.state import load

sums, plain, start = (
    load(Path(sys.argv[1]) / name / "mm_projector.bin") for name in ("remote", "resident", "start")
)
apart = max(float((sums[n] - t).norm() / (t - start[n]).norm()) for n, t in plain.items())
print(f"the run of secure sums is {apart:.1e} of its way apart from the open one")
sys.exit(apart > 1e-3)
PYTHON
    say "what the server has of a client: $(tail -1 "$out/remote/rounds.jsonl" | cut -c1-160)…"
else
    cmp "$out/remote/mm_projector.bin" "$out/resident/mm_projector.bin"
    say "both projectors are the same, bit for bit: runs/sites/{remote,resident}/mm_projector.bin"
fi
if pgrep -f "$out/kits" >/dev/null; then
    echo "error: a process is left" >&2
    exit 1
fi
say "no process is left"
