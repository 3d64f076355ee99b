# A site: `docker build -f docker/site.Dockerfile -t fedllava-site .` in the repository.
# /site has site.yaml, the kit and `work`, and is written to; /data is mounted read-only.
FROM python:3.11-slim

RUN useradd --create-home --uid 1000 fedllava
WORKDIR /opt/fedllava
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY llava llava
COPY fed fed
RUN torch="$(grep '^torch==' constraints.txt)" && \
    pip install --no-cache-dir -c constraints.txt "$torch" '.[remote]'

USER fedllava
WORKDIR /site
ENV HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# Ctrl-C and `docker stop` end the site cleanly; what it has done is in /site/work.
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "fed.site"]
CMD ["/site/site.yaml"]
