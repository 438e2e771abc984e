{{/* What a keeper uses of root's capabilities, as setpriv(1) names them. docs/operations.md says for what; tests/pod.rs shows that each is needed. */}}
{{- define "mayfly.capabilities" -}}
chown dac_override fowner fsetid kill setgid setuid net_admin sys_ptrace sys_admin sys_nice sys_resource mknod mac_admin
{{- end -}}

{{- define "mayfly.scheme" -}}
{{ ternary "HTTPS" "HTTP" (not (empty .Values.tls.existingSecret)) }}
{{- end -}}

{{/* Where other nodes reach this one, and how it knows them. */}}
{{- define "mayfly.peers" -}}
- { name: POD_IP, valueFrom: { fieldRef: { fieldPath: status.podIP } } }
{{- $host := ternary "[$(POD_IP)]" "$(POD_IP)" (eq .Values.peers.family "IPv6") }}
- { name: MAYFLY_PEER_ADDRESS, value: '{{ include "mayfly.scheme" . | lower }}://{{ $host }}:8080' }
{{- if .Values.tls.existingSecret }}
{{- with .Values.peers.tlsName }}
- { name: MAYFLY_PEER_TLS_NAME, value: {{ . }} }
{{- end }}
{{- with .Values.peers.caKey }}
- { name: MAYFLY_PEER_CA_FILE, value: /etc/mayfly/tls/{{ . }} }
{{- end }}
{{- else }}
- { name: MAYFLY_PEER_HTTP, value: 'true' }
{{- end }}
{{- end -}}

{{/* Whose tokens are believed. */}}
{{- define "mayfly.authentication" -}}
{{- with .Values.auth -}}
{{- if eq .mode "secret" }}
- { name: MAYFLY_JWT_SECRET_FILE, value: /etc/mayfly/auth/{{ .secretKey }} }
{{- else if eq .mode "publicKey" }}
{{- $files := list }}
{{- range .publicKeys }}
{{- $kid := "" }}
{{- with .kid }}
{{- $kid = printf "%s=" . }}
{{- end }}
{{- $files = append $files (printf "%s/etc/mayfly/auth/%s" $kid .key) }}
{{- end }}
- { name: MAYFLY_JWT_PUBLIC_KEY_FILE, value: {{ join "," $files | quote }} }
{{- else if eq .mode "jwksFile" }}
- { name: MAYFLY_JWT_JWKS_FILE, value: /etc/mayfly/auth/{{ .jwksKey }} }
{{- else }}
- { name: MAYFLY_JWT_JWKS_URL, value: {{ .jwksUrl | quote }} }
{{- with .caKey }}
- { name: MAYFLY_JWT_JWKS_CA_FILE, value: /etc/mayfly/auth/{{ . }} }
{{- end }}
{{- end }}
{{- with .issuer }}
- { name: MAYFLY_JWT_ISSUER, value: {{ . | quote }} }
{{- end }}
- { name: MAYFLY_JWT_AUDIENCE, value: {{ .audience | quote }} }
{{- end -}}
{{- end -}}
