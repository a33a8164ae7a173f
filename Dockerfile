# The service in a container: what the registry's alias points to, over HTTP, as a user without rights.
#
#   docker build -t aerec .
#   docker run --rm aerec python -c 'from aerec_nb.serving import main; main()' --new-key read
#   docker run -p 127.0.0.1:8000:8000 -v aerec-data:/data -e AEREC_SERVING__API_KEYS=read:sha256:... -e AEREC_SERVING__ALLOWED_HOSTS=api.example.org,localhost aerec
#
# It listens on all addresses of the container, so live asks for keys; without any it does not start. Requests are answered for the hosts of AEREC_SERVING__ALLOWED_HOSTS,
# and if that is empty for localhost only; /health is answered for any host, as health checks need it. It speaks plain HTTP: put a reverse proxy with TLS before it, name
# the proxy in AEREC_SERVING__TRUSTED_PROXIES, and keep /metrics inside (nbs/how_to/serve.ipynb shows how).
# /data holds the registry and its bundles (/data/registry.db, /data/bundles) and the event log (/data/events.db). AEREC_ENV says which alias is served;
# AEREC_PACKAGING__REGISTRY_URI names an MLflow server instead. Where pip's usual index brings torch with CUDA, name the index of its CPU builds:
#   docker build --build-arg TORCH_OPTIONS='--index-url ADDRESS' -t aerec .
# tests/test_packaging.py runs the steps of the first stage and the command as plain commands.

FROM python:3.11-slim AS build
ARG TORCH_OPTIONS=""
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /opt/venv
RUN /opt/venv/bin/python -m pip install --no-cache-dir -c constraints.txt pip setuptools wheel
RUN /opt/venv/bin/python -m pip install --no-cache-dir -c constraints.txt ${TORCH_OPTIONS} torch
COPY settings.ini setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY aerec_nb ./aerec_nb
RUN /opt/venv/bin/python -m pip install --no-cache-dir -c constraints.txt --no-build-isolation .

FROM python:3.11-slim
RUN useradd --system --uid 10001 --create-home aerec && install -d -o aerec -g aerec /data
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY settings.ini ./
COPY config ./config
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 AEREC_PROJECT=/app AEREC_ENV=live AEREC_PATHS__VAR_DIR=/data AEREC_EVENTS__EVENTS_URL=sqlite:////data/events.db
USER aerec
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=4s --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=3)"]
CMD ["aerec", "serve", "--host", "0.0.0.0", "--port", "8000"]
