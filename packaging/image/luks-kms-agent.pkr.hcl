# An image whose nodes encrypt their data volumes:
#
#   packer init packaging/image
#   packer build -var region=us-east-1 -var source_ami=ami-… -var package=…_amd64.deb -var config=config.yaml packaging/image
#
# docs/images.md has it step by step.

variable "region" {
  type        = string
  description = "Where the image is made, and its builder runs."
  validation {
    condition     = length(var.region) > 0 && regex_replace(var.region, "^[a-z]{2}(-[a-z]+)+-[0-9]$", "") == ""
    error_message = "The region has to look like us-east-1."
  }
}

variable "source_ami" {
  type        = string
  description = "The image to start from: Debian 12, Ubuntu 24.04, Amazon Linux 2023, or one of yours."
  validation {
    condition     = length(var.source_ami) > 0 && regex_replace(var.source_ami, "^ami-[0-9a-f]{8,17}$", "") == ""
    error_message = "The source_ami has to be an AMI's id, ami-…."
  }
}

variable "package" {
  type        = string
  description = "The package of luks-kms-agent: what `make package` writes to build/packages, for the image's architecture."
  validation {
    condition     = length(var.package) > 0 && regex_replace(var.package, "^.+\\.(deb|rpm)$", "") == ""
    error_message = "The package has to be a .deb or .rpm file."
  }
}

variable "config" {
  type        = string
  description = "The configuration of the nodes; it becomes /etc/luks-kms-agent/config.yaml."
  validation {
    condition     = length(var.config) > 0 && regex_replace(var.config, "^.+\\.ya?ml$", "") == ""
    error_message = "The config has to be a YAML file."
  }
}

variable "ssh_username" {
  type        = string
  description = "Who may log in on source_ami and use sudo: admin (Debian), ubuntu, ec2-user (Amazon Linux)."
  default     = "admin"
  validation {
    condition     = length(var.ssh_username) > 0
    error_message = "The ssh_username has to be a name."
  }
}

variable "instance_type" {
  type        = string
  description = "Of the builder. It needs no instance store; its data volumes would not be in the image anyway."
  default     = "t3.small"
  validation {
    condition     = length(var.instance_type) > 0 && regex_replace(var.instance_type, "^[a-z0-9-]+\\.[a-z0-9-]+$", "") == ""
    error_message = "The instance_type has to look like t3.small."
  }
}

variable "subnet_id" {
  type        = string
  description = "Where the builder runs; empty: in the default VPC."
  default     = ""
  validation {
    condition     = regex_replace(var.subnet_id, "^(subnet-[0-9a-f]{8,17})?$", "") == ""
    error_message = "The subnet_id has to be a subnet's id, subnet-…, or empty."
  }
}

variable "instance_profile" {
  type        = string
  description = "That of the nodes, for preflight; empty: none. Nothing else of the bake calls AWS."
  default     = ""
  validation {
    condition     = regex_replace(var.instance_profile, "^[A-Za-z0-9+=,.@_-]*$", "") == ""
    error_message = "The instance_profile has to be a name, not an ARN."
  }
}

variable "preflight" {
  type        = string
  description = "Whether role, KMS key and machine are checked on the builder: yes or no. Needs instance_profile."
  default     = "no"
  validation {
    condition     = contains(["yes", "no"], var.preflight)
    error_message = "The preflight has to be yes or no."
  }
}

variable "ami_name" {
  type        = string
  description = "Start of the image's name; the time follows."
  default     = "luks-kms-agent"
  validation {
    condition     = length(var.ami_name) > 0 && regex_replace(var.ami_name, "^[A-Za-z0-9()./_-]{3,100}$", "") == ""
    error_message = "The ami_name may have letters, digits and ()./_-, from 3 to 100."
  }
}

locals {
  folder = "/tmp/luks-kms-agent-image"
}

source "amazon-ebs" "node" {
  region               = var.region
  source_ami           = var.source_ami
  instance_type        = var.instance_type
  subnet_id            = var.subnet_id
  iam_instance_profile = var.instance_profile
  ssh_username         = var.ssh_username
  # The key of this build does not stay in the image.
  ssh_clear_authorized_keys = true

  ami_name        = "${var.ami_name}-${formatdate("YYYYMMDD-hhmmss", timestamp())}"
  ami_description = "Data volumes are encrypted by luks-kms-agent; made of ${var.source_ami}"

  # IMDSv2 alone: for the builder, and for every instance of the image.
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }
  imds_support = "v2.0"

  tags = {
    Name      = var.ami_name
    SourceAMI = var.source_ami
  }
}

build {
  sources = ["source.amazon-ebs.node"]

  provisioner "shell" {
    inline = ["mkdir ${local.folder}"]
  }

  provisioner "file" {
    sources     = ["${path.root}/install.sh", "${path.root}/seal.sh", "${path.root}/cleanup.sh", var.package]
    destination = "${local.folder}/"
  }

  provisioner "file" {
    source      = var.config
    destination = "${local.folder}/config.yaml"
  }

  provisioner "shell" {
    inline = [
      "cd ${local.folder}",
      "sudo PREFLIGHT=${var.preflight} sh install.sh config.yaml ${basename(var.package)}",
    ]
  }

  # Other provisioners of yours go here: what follows has to be the end.

  provisioner "shell" {
    inline = [
      "cd ${local.folder}",
      "sudo sh seal.sh",
      "sudo sh cleanup.sh ${local.folder}",
    ]
  }
}
