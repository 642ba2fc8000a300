{{/* The longest name that is made of it ends in -gateway-internal, and a Service's may have 63 characters. */}}
{{- define "kubeinfer.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 46 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 46 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 46 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels of a component: include "kubeinfer.labels" (list $ "operator") */}}
{{- define "kubeinfer.labels" -}}
{{ include "kubeinfer.selector" . }}
app.kubernetes.io/component: {{ index . 1 }}
app.kubernetes.io/part-of: kubeinfer
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end -}}

{{- define "kubeinfer.selector" -}}
app.kubernetes.io/name: kubeinfer-{{ index . 1 }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
{{- end -}}

{{/* include "kubeinfer.image" (list $ .Values.images.operator) */}}
{{- define "kubeinfer.image" -}}
{{- $image := index . 1 -}}
{{- printf "%s:%s" $image.repository (default (index . 0).Chart.AppVersion $image.tag) -}}
{{- end -}}

{{/* What this API server lacks is decided here and nowhere else. "true" or "". */}}
{{- define "kubeinfer.hasRules" -}}{{/* CEL in CustomResourceDefinitions */}}
{{- if semverCompare ">=1.25.0-0" .Capabilities.KubeVersion.Version }}true{{ end -}}
{{- end -}}
{{- define "kubeinfer.policyVersion" -}}
{{/* both: `helm template` takes its own list for the server's */}}{{- if and (.Capabilities.APIVersions.Has "policy/v1") (semverCompare ">=1.21.0-0" .Capabilities.KubeVersion.Version) }}policy/v1{{ else }}policy/v1beta1{{ end -}}
{{- end -}}

{{/* Takes the CEL rules out of a schema, in place. */}}
{{- define "kubeinfer.dropRules" -}}
{{- if kindIs "map" . -}}
{{- $_ := unset . "x-kubernetes-validations" -}}
{{- range $value := . }}{{ include "kubeinfer.dropRules" $value }}{{ end -}}
{{- else if kindIs "slice" . -}}
{{- range $value := . }}{{ include "kubeinfer.dropRules" $value }}{{ end -}}
{{- end -}}
{{- end -}}

{{/* Namespaces of the roles: "" stands for the cluster. A JSON list. */}}
{{- define "kubeinfer.scopes" -}}
{{- if .Values.watchNamespaces }}{{ .Values.watchNamespaces | toJson }}{{ else }}[""]{{ end -}}
{{- end -}}

{{- define "kubeinfer.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "kubeinfer.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Role and binding of one component in every scope: (list $ "operator" "name of the template with the rules") */}}
{{- define "kubeinfer.roles" -}}
{{- $root := index . 0 -}}{{- $component := index . 1 -}}{{- $rules := index . 2 -}}
{{- $name := printf "%s-%s" (include "kubeinfer.fullname" $root) $component -}}
{{- range $namespace := include "kubeinfer.scopes" $root | fromJsonArray }}
{{- $kind := ternary "Role" "ClusterRole" (ne $namespace "") }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ $kind }}
metadata:
  name: {{ $name }}
  {{- if $namespace }}
  namespace: {{ $namespace }}
  {{- end }}
  labels:
    {{- include "kubeinfer.labels" (list $root $component) | nindent 4 }}
rules:
  {{- include $rules $root | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ $kind }}Binding
metadata:
  name: {{ $name }}
  {{- if $namespace }}
  namespace: {{ $namespace }}
  {{- end }}
  labels:
    {{- include "kubeinfer.labels" (list $root $component) | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: {{ $kind }}
  name: {{ $name }}
subjects:
  - kind: ServiceAccount
    name: {{ $name }}
    namespace: {{ $root.Release.Namespace }}
{{- end }}
{{- end -}}
