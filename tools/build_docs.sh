#!/usr/bin/env bash
# Builds the documentation site: `bash tools/build_docs.sh OUT`; a broken link or any other warning is an error.
# OUT is new, or has an earlier build, which is replaced. No page loads anything from another host.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: bash tools/build_docs.sh OUT}")
if [ -e "$out" ] && [ ! -f "$out/objects.inv" ]; then
  echo "$out: exists and is no site of an earlier build; choose another folder, or remove it" >&2
  exit 1
fi
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
uv run python tools/docs_pages.py "$stage"
# In an environment of its own: the site needs no package of the workspace.
uv run --isolated --only-group docs zensical build --strict --config-file "$stage/zensical.toml"
# It would look for its style at the root of the host, also below a path.
rm "$stage/site/404.html"
rm -rf "$out"
mkdir -p "$(dirname "$out")"
mv "$stage/site" "$out"
echo "site: $out/index.html"
