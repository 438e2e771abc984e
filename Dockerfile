# The image of a node: the service and the keeper, each for a container of its own (helm/mayfly says how they are started).
#
# Both stages begin with images that whoever builds names, by digest where the result is to be the same again: RUST_IMAGE has this compiler (rust-toolchain.toml) and a C
# compiler on Debian, BASE_IMAGE is the same release of Debian, slim. `make image` makes BASE_IMAGE itself and puts programs that are built already in place of the first stage.
ARG DEBIAN=bookworm
ARG RUST_IMAGE=rust:1.95.0-slim-${DEBIAN}
ARG BASE_IMAGE=debian:${DEBIAN}-slim

FROM ${RUST_IMAGE} AS programs
ARG SOURCE_DATE_EPOCH=0
WORKDIR /source
COPY . .
# Where the source lies is not to be seen in what is made of it.
RUN SQLX_OFFLINE=true CARGO_INCREMENTAL=0 CARGO_TARGET_DIR=/target RUSTFLAGS='--remap-path-prefix=/source=mayfly --remap-path-prefix=/usr/local/cargo=cargo' \
    cargo build --release --locked --package mayfly --package sandbox-core --bins

FROM ${BASE_IMAGE}
# What is started beside them: apparmor_parser loads the profile of sandboxes, mke2fs makes layers on disk, setpriv takes a keeper's capabilities back. A base that has all of it is not added to.
RUN if command -v apparmor_parser && command -v mke2fs && command -v setpriv && test -e /etc/ssl/certs/ca-certificates.crt; then exit 0; fi; \
    apt-get update && apt-get install --yes --no-install-recommends apparmor ca-certificates e2fsprogs util-linux && \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/aux-cache /var/log/*
# The numbers are the chart's `user`: who has them on the machine owns the service's half of the data folder.
RUN grep -q '^mayfly:' /etc/passwd || { \
        echo 'mayfly:x:10001:' >>/etc/group && echo 'mayfly:x:10001:10001:Mayfly:/nonexistent:/usr/sbin/nologin' >>/etc/passwd; \
    }
COPY --from=programs --chmod=0755 /target/release/mayfly /target/release/sandbox-keeper /target/release/sandbox-init /target/release/sandbox-unpack /usr/local/bin/
COPY --chmod=0644 LICENSE /usr/share/doc/mayfly/LICENSE
USER 10001:10001
EXPOSE 8080 9464
ENTRYPOINT ["mayfly"]
CMD ["serve"]
