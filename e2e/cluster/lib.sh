# Sourced by every script here: where things live and which addresses the cluster has.
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
home=${KUBEINFER_CLUSTER_HOME:-/var/cache/kubeinfer-cluster}
bin=$home/bin            # Kubernetes, kubectl, helm: made once by ./build
images=$home/images      # image tars that every node imports when it starts
store=$home/buildah      # buildah's own storage
pki=$home/pki            # certificates and kubeconfigs, made once
state=$home/run          # what lives only while the cluster runs
host_ip=10.200.0.1       # bridge on the host: API server and DNS. Node i is 10.200.0.(10+i)
services=10.202.0.0/16   # ClusterIPs; the pods of node i are in 10.201.i.0/24
nodes=${NODES:-1}
gates=BoundServiceAccountTokenVolume=true,TTLAfterFinished=true,SizeMemoryBackedVolumes=true   # on by default since 1.23
export PATH=$bin:$PATH KUBECONFIG=$pki/admin.kubeconfig

die() { echo "$(basename "$0"): $*" >&2; exit 1; }
pid_of() { cat "$state/pid/$1" 2>/dev/null; }
# A zombie counts as gone: PID 1 of a container or a small VM may be slow to reap.
alive() { [ -n "$1" ] && [ -e "/proc/$1/stat" ] && ! grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null; }
until_ok() { local n=$1; shift; for _ in $(seq "$n"); do "$@" >/dev/null 2>&1 && return; sleep .1; done; return 1; }
buildah() { command buildah --root "$store/root" --runroot "$store/runroot" --storage-driver overlay "$@"; }
