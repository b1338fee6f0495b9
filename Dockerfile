# A server of exported models, on the CPU and without torch:
#
#     docker build -t flawsift .
#     docker run --read-only -p 8000:8000 -e FLAWSIFT_API_KEY=... -v ./line:/model:ro flawsift
#
# docs/deploy.md says what it holds; `make container` builds and tries it.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /source
# pip installs dependency groups from version 25.1 on
RUN python -m venv /opt/flawsift && /opt/flawsift/bin/python -m pip install --no-cache-dir --upgrade 'pip>=25.1'
# first what changes rarely, so that a change of the source installs nothing anew
COPY pyproject.toml constraints.txt ./
RUN /opt/flawsift/bin/python -m pip install --no-cache-dir --constraint constraints.txt --group runtime
COPY README.md LICENSE ./
COPY src src
RUN /opt/flawsift/bin/python -m pip install --no-cache-dir --no-deps . \
    && /opt/flawsift/bin/python -m pip uninstall --yes pip

FROM python:${PYTHON}-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin flawsift
COPY --from=build /opt/flawsift /opt/flawsift
ENV PATH=/opt/flawsift/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
# 127.0.0.1: the check needs no key
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["flawsift"]
CMD ["serve", "/model", "--host", "0.0.0.0"]
