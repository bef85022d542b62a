{{/* Labels by which the parts are found; they never change. The controller looks for agents by them. */}}
{{- define "undermesh.selector" -}}
app.kubernetes.io/name: undermesh
app.kubernetes.io/component: {{ . }}
{{- end }}

{{- define "undermesh.labels" -}}
{{ include "undermesh.selector" .component }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end }}

{{- define "undermesh.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* host:port, with brackets for IPv6. */}}
{{- define "undermesh.agent.admin" -}}
{{- $host := .Values.agent.admin.host | trimPrefix "[" | trimSuffix "]" -}}
{{- if contains ":" $host -}}[{{ $host }}]{{- else -}}{{ $host }}{{- end -}}:{{ .Values.agent.admin.port }}
{{- end }}

{{/* What cannot be meant as it is said, in a sentence. */}}
{{- define "undermesh.check" -}}
{{- if not (or .Values.controller.enabled .Values.identity.external.address) -}}
{{- fail "nobody would sign certificates: set controller.enabled, or identity.external.address" -}}
{{- end -}}
{{- if and .Values.agent.mountBpffs.enabled (not .Values.agent.mountBpffs.image) -}}
{{- fail "agent.mountBpffs.image is needed with agent.mountBpffs.enabled: an image with sh, grep and mount" -}}
{{- end -}}
{{- with .Values.agent.tracing -}}
{{- if and (hasPrefix "https://" .endpoint) (not .caConfigMap.name) -}}
{{- fail "agent.tracing.caConfigMap.name is needed with an endpoint that is https://: the image has no roots of its own" -}}
{{- end -}}
{{- end -}}
{{- if has .Values.agent.admin.host (list "127.0.0.1" "::1" "[::1]") -}}
{{- fail (printf "agent.admin.host is %s, where the kubelet cannot ask the agent how it is: its pod has a network of its own" .Values.agent.admin.host) -}}
{{- end -}}
{{- if and .Values.priorityClass.create (ne .Values.agent.priorityClassName .Values.priorityClass.name) -}}
{{- fail (printf "priorityClass.create makes %q, and agent.priorityClassName names %q" .Values.priorityClass.name .Values.agent.priorityClassName) -}}
{{- end -}}
{{- end }}
